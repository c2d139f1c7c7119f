// SPDX-License-Identifier: LGPL-2.1-or-later
/* Which tracker it is to be. */
#include "tracker.h"

int kmig_tracker_accepts(enum kmig_tracker_kind kind, const struct kmig_region *region)
{
	switch (kind) {
	case KMIG_TRACKER_AUTO:
	case KMIG_TRACKER_LMTRACK:
		if (region->kind == KMIG_REGION_LMTRACK)
			return 0;
		return kmig_fail(region->ctx, -EOPNOTSUPP, "region %s is a memfd: only an lmtrack region can be migrated from", region->name);
	}
	return kmig_fail(region->ctx, -EINVAL, "source: tracker %d is not known", kind);
}

int kmig_tracker_new(const struct kmig_tracker_config *config, struct kmig_tracker **tracker)
{
	return kmig_tracker_new_lmtrack(config, tracker);
}
