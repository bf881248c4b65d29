"""`python -m xmask` is the `xmask` command."""

from xmask.cli import main

raise SystemExit(main())
