"""The browser that opens the pages of the report; tests marked `browser` need it."""

import shutil

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
