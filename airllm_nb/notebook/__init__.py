"""The notebook's side: magics, display, session. Talks to the engine through its public API and events only."""
