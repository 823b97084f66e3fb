import os

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # of torch.profiler: it logs every start and stop
