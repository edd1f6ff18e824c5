"""The shop's pages, and the admin."""

from django.contrib import admin
from django.urls import path

from shop import views

urlpatterns = [
    path("", views.orders, name="orders"),
    path("orders/<int:pk>/", views.order, name="order"),
    path("orders/<int:pk>/status", views.status, name="status"),
    path("orders/<int:pk>/approve", views.approve, name="approve"),
    path("admin/", admin.site.urls),
]
