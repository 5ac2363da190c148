"""The command line: `storyadapter-trt build | run | bench | doctor`."""
