"""`storyadapter-trt bench throughput`: a ladder from the published method to this project, one step at a time."""
