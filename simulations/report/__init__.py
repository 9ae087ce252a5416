"""What runs came to: a page, Markdown, JSON and CSV, of one run or of several side by side."""
