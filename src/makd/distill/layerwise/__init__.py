"""Station 7: layers taught one at a time, on the way of a factorization or afterwards."""
