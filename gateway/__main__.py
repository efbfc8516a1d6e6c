"""`python -m gateway` is `telephony-gateway`."""

from gateway.cli import main

if __name__ == "__main__":
    main(prog_name="telephony-gateway")
