"""Tests state laws; one file per program file, and the cross-cutting ones."""
