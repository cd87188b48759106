"""One running guest behind one small interface."""
