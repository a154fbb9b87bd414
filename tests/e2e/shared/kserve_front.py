"""KServe's model server in front of TorchServe, as KServe's image for TorchServe runs one. Run in .venv-kserve.

kserve_front.py --model_name M --http_port P --predictor_host HOST:PORT --predictor_protocol v1 --enable_grpc false
"""

import kserve
from kserve.model_server import parser

if __name__ == "__main__":
    model = kserve.Model(parser.parse_args().model_name)
    model.ready = True
    kserve.ModelServer().start([model])
