/* SPDX-License-Identifier: GPL-2.0 */
/*
 * An RDMA device that does nothing, for a destination: it is listened on, and one source asks to be let
 * in on it, for channel 0, with the right token. Nothing comes of that connection. Needs the linker to
 * wrap what is called __wrap_ here; who includes it says what fails, by verbs_fails().
 */
#ifndef LIB_VERBS_H
#define LIB_VERBS_H

#include <rdma/rdma_cma.h>
#include <sys/eventfd.h>

#include "../lib/auth.h"
#include "../lib/rdma.h"

/* The errno that this call shall give now, or 0. */
static int verbs_fails(const void *caller);
#define VERBS_FAIL() verbs_fails(__builtin_return_address(0))

static struct {
	struct ibv_context context;
	struct ibv_pd pd;
	struct ibv_mr mr;
	struct ibv_cq cq;
	struct ibv_qp qp;
	struct ibv_comp_channel comp;
	struct rdma_event_channel events;
	struct rdma_cm_id listener, request;
	struct rdma_cm_event event;
	struct lmtrack_wire_token token;
	bool listens, asked;
	int left;		/* objects that were made, and not destroyed */
	unsigned int accepted;
} verbs;

#define VERBS_NEW(type, name, parameters, object)	\
type *__wrap_##name parameters;				\
type *__wrap_##name parameters				\
{							\
	if (VERBS_FAIL())				\
		return NULL;				\
	verbs.left++;					\
	return object;					\
}

#define VERBS_END(type, name, parameters, result)	\
type __wrap_##name parameters;				\
type __wrap_##name parameters				\
{							\
	verbs.left--;					\
	return result;					\
}

#define VERBS_UNUSED __attribute__((unused))

VERBS_NEW(struct ibv_pd, ibv_alloc_pd, (struct ibv_context *on VERBS_UNUSED), &verbs.pd)
VERBS_NEW(struct ibv_mr, ibv_reg_mr, (struct ibv_pd *pd VERBS_UNUSED, void *at VERBS_UNUSED, size_t length VERBS_UNUSED,
				      int access VERBS_UNUSED), &verbs.mr)
VERBS_NEW(struct ibv_cq, ibv_create_cq, (struct ibv_context *on VERBS_UNUSED, int entries VERBS_UNUSED,
					 void *data VERBS_UNUSED, struct ibv_comp_channel *events VERBS_UNUSED,
					 int vector VERBS_UNUSED), &verbs.cq)
VERBS_END(int, ibv_dealloc_pd, (struct ibv_pd *pd VERBS_UNUSED), 0)
VERBS_END(int, ibv_dereg_mr, (struct ibv_mr *mr VERBS_UNUSED), 0)
VERBS_END(int, ibv_destroy_cq, (struct ibv_cq *cq VERBS_UNUSED), 0)
VERBS_END(int, rdma_destroy_id, (struct rdma_cm_id *id VERBS_UNUSED), 0)

struct ibv_comp_channel *__wrap_ibv_create_comp_channel(struct ibv_context *on);
struct ibv_comp_channel *__wrap_ibv_create_comp_channel(struct ibv_context *on)
{
	(void)on;
	if (VERBS_FAIL())
		return NULL;
	verbs.left++;
	verbs.comp.fd = eventfd(0, EFD_CLOEXEC);
	return &verbs.comp;
}

int __wrap_ibv_destroy_comp_channel(struct ibv_comp_channel *channel);
int __wrap_ibv_destroy_comp_channel(struct ibv_comp_channel *channel)
{
	verbs.left--;
	close(channel->fd);
	return 0;
}

int __wrap_ibv_query_device(struct ibv_context *on, struct ibv_device_attr *attr);
int __wrap_ibv_query_device(struct ibv_context *on, struct ibv_device_attr *attr)
{
	(void)on;
	*attr = (struct ibv_device_attr){ .max_mr = 1000, .max_mr_size = UINT64_MAX };
	return VERBS_FAIL();
}

struct rdma_event_channel *__wrap_rdma_create_event_channel(void);
struct rdma_event_channel *__wrap_rdma_create_event_channel(void)
{
	if (VERBS_FAIL())
		return NULL;
	verbs.left++;
	verbs.events.fd = eventfd(0, EFD_CLOEXEC);
	return &verbs.events;
}

void __wrap_rdma_destroy_event_channel(struct rdma_event_channel *channel);
void __wrap_rdma_destroy_event_channel(struct rdma_event_channel *channel)
{
	verbs.left--;
	close(channel->fd);
}

int __wrap_rdma_create_id(struct rdma_event_channel *events, struct rdma_cm_id **id, void *data,
			  enum rdma_port_space space);
int __wrap_rdma_create_id(struct rdma_event_channel *events, struct rdma_cm_id **id, void *data,
			  enum rdma_port_space space)
{
	(void)events, (void)data, (void)space;
	if (VERBS_FAIL())
		return -1;
	verbs.left++;
	*id = &verbs.listener;
	return 0;
}

int __wrap_rdma_bind_addr(struct rdma_cm_id *id, struct sockaddr *address);
int __wrap_rdma_bind_addr(struct rdma_cm_id *id, struct sockaddr *address)
{
	(void)address;
	if (VERBS_FAIL())
		return -1;
	id->verbs = &verbs.context;
	return 0;
}

int __wrap_rdma_listen(struct rdma_cm_id *id, int backlog);
int __wrap_rdma_listen(struct rdma_cm_id *id, int backlog)
{
	(void)id, (void)backlog;
	if (VERBS_FAIL())
		return -1;
	verbs.listens = true;
	return 0;
}

__be16 __wrap_rdma_get_src_port(struct rdma_cm_id *id);
__be16 __wrap_rdma_get_src_port(struct rdma_cm_id *id)
{
	(void)id;
	return htons(1);
}

static int verbs_post_recv(struct ibv_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
	(void)qp;
	*bad = wr;
	return VERBS_FAIL();
}

/* The one request, as soon as it is listened. */
int __wrap_rdma_get_cm_event(struct rdma_event_channel *channel, struct rdma_cm_event **event);
int __wrap_rdma_get_cm_event(struct rdma_event_channel *channel, struct rdma_cm_event **event)
{
	(void)channel;
	if (!verbs.listens || verbs.asked) {
		errno = EAGAIN;
		return -1;
	}
	if (VERBS_FAIL())
		return -1;
	verbs.asked = true;
	verbs.left++;
	verbs.context.ops.post_recv = verbs_post_recv;
	verbs.request.verbs = &verbs.context;
	verbs.event = (struct rdma_cm_event){
		.id = &verbs.request, .listen_id = &verbs.listener, .event = RDMA_CM_EVENT_CONNECT_REQUEST,
		.param.conn = { .private_data = &verbs.token, .private_data_len = sizeof(verbs.token) },
	};
	*event = &verbs.event;
	return 0;
}

int __wrap_rdma_ack_cm_event(struct rdma_cm_event *event);
int __wrap_rdma_ack_cm_event(struct rdma_cm_event *event)
{
	(void)event;
	return 0;
}

int __wrap_rdma_create_qp(struct rdma_cm_id *id, struct ibv_pd *pd, struct ibv_qp_init_attr *attr);
int __wrap_rdma_create_qp(struct rdma_cm_id *id, struct ibv_pd *pd, struct ibv_qp_init_attr *attr)
{
	(void)pd, (void)attr;
	if (VERBS_FAIL())
		return -1;
	verbs.left++;
	verbs.qp.context = &verbs.context;
	id->qp = &verbs.qp;
	return 0;
}

void __wrap_rdma_destroy_qp(struct rdma_cm_id *id);
void __wrap_rdma_destroy_qp(struct rdma_cm_id *id)
{
	verbs.left--;
	id->qp = NULL;
}

int __wrap_rdma_accept(struct rdma_cm_id *id, struct rdma_conn_param *param);
int __wrap_rdma_accept(struct rdma_cm_id *id, struct rdma_conn_param *param)
{
	(void)id, (void)param;
	if (VERBS_FAIL())
		return -1;
	verbs.accepted++;
	return 0;
}

int __wrap_rdma_reject(struct rdma_cm_id *id, const void *data, uint8_t length);
int __wrap_rdma_reject(struct rdma_cm_id *id, const void *data, uint8_t length)
{
	(void)id, (void)data, (void)length;
	return VERBS_FAIL() ? -1 : 0;
}

int __wrap_rdma_disconnect(struct rdma_cm_id *id);
int __wrap_rdma_disconnect(struct rdma_cm_id *id)
{
	(void)id;
	return VERBS_FAIL() ? -1 : 0;
}

/* The token is made from what the engine alone knows. */
int __real_kmig_rdma_listen(struct kmig_ctx *ctx, const struct kmig_chunks *chunks, const struct kmig_session *session,
			    uint64_t stream, unsigned int channels, int control, uint64_t window_bytes,
			    struct kmig_rdma **out, char why[KMIG_ERROR_MAX]);
int __wrap_kmig_rdma_listen(struct kmig_ctx *ctx, const struct kmig_chunks *chunks, const struct kmig_session *session,
			    uint64_t stream, unsigned int channels, int control, uint64_t window_bytes,
			    struct kmig_rdma **out, char why[KMIG_ERROR_MAX]);
int __wrap_kmig_rdma_listen(struct kmig_ctx *ctx, const struct kmig_chunks *chunks, const struct kmig_session *session,
			    uint64_t stream, unsigned int channels, int control, uint64_t window_bytes,
			    struct kmig_rdma **out, char why[KMIG_ERROR_MAX])
{
	if (kmig_auth_token(session, stream, 0, &verbs.token))
		memset(&verbs.token, 0, sizeof(verbs.token));
	return __real_kmig_rdma_listen(ctx, chunks, session, stream, channels, control, window_bytes, out, why);
}

#endif /* LIB_VERBS_H */
