"""How units are placed: by numbers alone, with experts apart, on the CPU or a GPU."""
