"""python -m bench.kills."""

from bench.kills.run import main

if __name__ == "__main__":
    main()
