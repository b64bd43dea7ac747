"""The protocol once more, in pure Python and independent of `meerkat_mq`: to read, and to test others against."""
