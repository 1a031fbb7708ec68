"""Station 3: how many parameters a student may have, and how they are shared out."""
