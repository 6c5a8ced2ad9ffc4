"""A page in the browser to try names on images: ``fastzs demo``. It needs the extra ``demo``."""
