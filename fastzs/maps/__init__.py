"""Maps: GeoTIFFs of any height, read and written a part at a time (extra ``geo``)."""
