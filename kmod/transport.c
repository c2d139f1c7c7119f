// SPDX-License-Identifier: GPL-2.0
/*
 * lmtrack: transports in modules of their own, so that a host that does not use them loads
 * nothing of what they are built on.
 *
 * transport_lock guards the pointer. A transport is there while its module is, and each channel
 * holds that module, so it goes no sooner than they.
 */
#include <linux/kmod.h>
#include <linux/module.h>
#include <linux/mutex.h>

#include "lmtrack.h"

static DEFINE_MUTEX(transport_lock);
static const struct lmtrack_transport *transport_rdma;

void lmtrack_transport_register(const struct lmtrack_transport *transport)
{
	mutex_lock(&transport_lock);
	transport_rdma = transport;
	mutex_unlock(&transport_lock);
}
EXPORT_SYMBOL_GPL(lmtrack_transport_register);

void lmtrack_transport_unregister(const struct lmtrack_transport *transport)
{
	mutex_lock(&transport_lock);
	if (transport_rdma == transport)
		transport_rdma = NULL;
	mutex_unlock(&transport_lock);
}
EXPORT_SYMBOL_GPL(lmtrack_transport_unregister);

static const struct lmtrack_transport *transport_get(void)
{
	const struct lmtrack_transport *transport;

	mutex_lock(&transport_lock);
	transport = transport_rdma;
	if (transport && !try_module_get(transport->owner))
		transport = NULL;
	mutex_unlock(&transport_lock);
	return transport;
}

/* RDMA, loaded if need be, with a reference to its module; NULL: it is not to be had. */
const struct lmtrack_transport *lmtrack_transport_get_rdma(void)
{
	const struct lmtrack_transport *transport = transport_get();

	if (transport)
		return transport;
	request_module("lmtrack_rdma");
	return transport_get();
}

void lmtrack_transport_put(const struct lmtrack_transport *transport)
{
	module_put(transport->owner);
}
