"""From the user's module to an ATen graph whose batch is free. Imports runtime and below; not analysis or planning."""
