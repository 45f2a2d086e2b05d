"""The node agent: lends out this machine's memory and disk, and takes it back, proved.

Three processes share one page of memory: `control` decides and writes everything down, `front`
moves the holders' bytes, `warden` takes everything back even if the other two die. Nothing is
imported here: the warden must start in a blink, with the standard library alone.
"""
