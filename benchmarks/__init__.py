import os

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # otherwise torch.profiler logs every start and stop
