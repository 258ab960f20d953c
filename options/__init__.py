"""Every option of a run: declared, checked, composed."""
