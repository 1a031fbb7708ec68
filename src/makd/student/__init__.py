"""Station 3: what a student is made of, and how it is saved and loaded."""
