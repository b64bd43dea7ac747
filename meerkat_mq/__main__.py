"""`python -m meerkat_mq`, the same as `meerkat`."""

from meerkat_mq.observe.start import start


def main() -> None:
    """Entry point of the process: signals count before the rest is imported."""
    start()
    from meerkat_mq import cli  # noqa: PLC0415

    cli.main()


if __name__ == "__main__":
    main()
