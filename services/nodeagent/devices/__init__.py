"""What a node lends: each file is one device, and knows how to make, erase and measure a slice.

Every device erases and measures by different ways, so that a receipt never repeats what the erase
believed of itself.
"""
