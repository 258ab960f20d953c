"""One run: what it is made of, how it goes on, what it leaves behind."""
