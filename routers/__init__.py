"""Which expert a token goes to, and what uneven use of the experts costs."""
