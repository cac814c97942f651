"""A net as a whole: traced layers, plan, cost, surgery, projection, BN re-estimation, files.

Calling the package is `compress(model, plan)`.
"""

from ranksearch._callable import make_callable
from ranksearch.compress.batchnorm import reestimate_bn_
from ranksearch.compress.export import load_net, save_net
from ranksearch.compress.periodic import PeriodicProjection, project_every
from ranksearch.compress.projection import Projector, project_
from ranksearch.compress.surgery import restructure_
from ranksearch.model.cost import Cost, dense_cost, layer_cost, plan_cost
from ranksearch.model.plan import DENSE, LayerPlan, RankPlan
from ranksearch.model.trace import Layer, Net, trace

make_callable(__name__, "ranksearch.compress.surgery:compress")

__all__ = [
    "DENSE",
    "Cost",
    "Layer",
    "LayerPlan",
    "Net",
    "PeriodicProjection",
    "Projector",
    "RankPlan",
    "dense_cost",
    "layer_cost",
    "load_net",
    "plan_cost",
    "project_",
    "project_every",
    "reestimate_bn_",
    "restructure_",
    "save_net",
    "trace",
]
