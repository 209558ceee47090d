"""From files to devices: what to read, asynchronous reads, the buffer they fill, and the copies out of it."""
