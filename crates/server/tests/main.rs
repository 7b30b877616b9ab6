//! The server over loopback TCP, in front of an engine whose tokens are scripted.
