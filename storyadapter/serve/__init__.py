"""Stories over HTTP: a queue that outlives the process, events, pictures, metrics, a page."""
