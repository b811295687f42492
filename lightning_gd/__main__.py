import sys

from lightning_gd.cli import main

sys.exit(main())
