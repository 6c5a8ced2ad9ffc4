import sys

from fastzs.cli import main

sys.exit(main())
