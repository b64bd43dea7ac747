"""`python -m meerkat_mq`, the same as `meerkat`."""

from meerkat_mq.cli import main

if __name__ == "__main__":
    main()
