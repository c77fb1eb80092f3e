"""python -m bench.sharding."""

from bench.sharding.run import main

if __name__ == "__main__":
    main()
