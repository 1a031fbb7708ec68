"""Station 3: from teacher, budget and text to a student."""
