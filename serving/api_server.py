"""`python -m pjengine.serving.api_server --model MODEL`: `pjengine serve`, which has /generate too."""

import sys

from pjengine.serving.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
