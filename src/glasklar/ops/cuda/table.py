"""The kernels as one table; importing it needs Triton."""

from __future__ import annotations

from glasklar.ops.cuda import attention, pointwise, products
from glasklar.ops.paged import PagedOps

TRITON = PagedOps(
    name="triton",
    add_norm=pointwise.add_norm,
    product=products.product,
    products=products.products,
    gated_product=products.gated_product,
    turn_latent=pointwise.turn_latent,
    turn_heads=pointwise.turn_heads,
    attend=attention.attend,
    gate=products.gate,
    route=pointwise.route,
    experts=products.experts,
    draw=pointwise.draw,
)
