"""Adds to makd: solver `scaled_svd`, aspect `lengths`, anatomy `twostroke`. makd finds them by their entry points."""
