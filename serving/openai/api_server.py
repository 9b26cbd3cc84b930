"""`python -m pjengine.serving.openai.api_server --model MODEL`: the same as `pjengine serve MODEL`."""

import sys

from pjengine.serving.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
