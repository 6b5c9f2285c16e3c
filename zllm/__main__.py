"""`python -m zllm` is the `zllm` command."""

import sys

from zllm.cli import main

sys.exit(main())
