"""python -m bench.mopo."""

from bench.mopo.run import main

if __name__ == "__main__":
    main()
