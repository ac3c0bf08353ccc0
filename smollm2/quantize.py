"""The command of that name is gone: `python -m smollm2.perplexity --compare int8` prints its table."""

import sys

if __name__ == "__main__":
    print(
        "error: python -m smollm2.quantize is now python -m smollm2.perplexity --compare bf16,int8,int4",
        file=sys.stderr,
    )
    sys.exit(2)
