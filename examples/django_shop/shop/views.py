"""A form that starts a run together with its order, a page that follows it, and a button that lets it go on."""

from django.contrib import messages
from django.contrib.admin.views.decorators import staff_member_required
from django.db import transaction
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_POST
from stepfast import Misuse
from stepfast.django import enqueue, run

from shop.models import Order


class OrderForm(ModelForm):
    class Meta:
        model = Order
        fields = ("customer", "item", "quantity")


def orders(request: HttpRequest) -> HttpResponse:
    form = OrderForm(request.POST or None)
    if request.method == "POST" and form.is_valid():
        with transaction.atomic():
            order = form.save()
            given = {"order": order.pk, "item": order.item, "quantity": order.quantity}
            order.run_id = enqueue("fulfilment", given, key=f"order-{order.pk}").id
            order.save(update_fields=["run_id"])
        return redirect("order", order.pk)
    return render(request, "shop/orders.html", {"form": form, "orders": Order.objects.order_by("-pk")[:20]})


def order(request: HttpRequest, pk: int) -> HttpResponse:
    return render(request, "shop/order.html", {"order": get_object_or_404(Order, pk=pk)})


def status(_request: HttpRequest, pk: int) -> JsonResponse:
    """What the page asks for twice a second."""
    found = get_object_or_404(Order, pk=pk)
    now = run(found.run_id).status()
    asks = [{"agent": ask.agent, "digest": ask.digest, "shown": ask.shown} for ask in now.asks]
    return JsonResponse(
        {"order": found.state, "run": now.state, "steps": dict(now.steps), "asks": asks, "error": now.error}
    )


@require_POST
@staff_member_required
def approve(request: HttpRequest, pk: int) -> HttpResponse:
    """Exactly what the page showed is approved: the digest names it."""
    found = get_object_or_404(Order, pk=pk)
    handle = run(found.run_id)
    try:
        handle.approve("ship", by=request.user.get_username(), digest=request.POST.get("digest", "")).wait()
    except Misuse as error:
        messages.error(request, str(error))
    return redirect("order", pk)
