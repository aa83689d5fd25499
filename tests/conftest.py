"""What all tests share: they neither use nor fill the cache of whoever runs them."""

import os
import tempfile

# For the processes that tests start, too. Removed when the tests end.
_folder = tempfile.TemporaryDirectory(prefix="balance_shim-tests-")
os.environ["XDG_CACHE_HOME"] = _folder.name
