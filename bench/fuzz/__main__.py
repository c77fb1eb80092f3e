"""python -m bench.fuzz."""

from bench.fuzz.run import main

if __name__ == "__main__":
    main()
