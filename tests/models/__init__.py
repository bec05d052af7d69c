"""Models to convert: `small`, one per timm family; `generated`, private ones of any spelling; `colours`, with data."""
