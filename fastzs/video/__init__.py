"""Videos: frames streamed in, label maps and an overlay out (extra ``video``)."""
