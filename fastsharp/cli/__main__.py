"""`python -m fastsharp.cli`."""

from fastsharp.cli import main

raise SystemExit(main())
