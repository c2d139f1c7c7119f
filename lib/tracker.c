// SPDX-License-Identifier: LGPL-2.1-or-later
/* Which tracker it is to be. */
#include "tracker.h"

int kmig_tracker_accepts(enum kmig_tracker_kind kind, struct kmig_region *const *regions, unsigned int count,
			 const struct kmig_region *region)
{
	bool lmtrack = region->kind == KMIG_REGION_LMTRACK;
	int err;

	switch (kind) {
	case KMIG_TRACKER_AUTO:
		err = lmtrack ? 0 : kmig_tracker_pagemap_accepts(region);
		if (!err && count && regions[0]->kind != region->kind)
			err = kmig_fail(region->ctx, -EOPNOTSUPP, "regions %s and %s are of different kinds: one tracker is for all",
					regions[0]->name, region->name);
		return err;
	case KMIG_TRACKER_LMTRACK:
		if (lmtrack)
			return 0;
		return kmig_fail(region->ctx, -EOPNOTSUPP, "region %s is a memfd: the tracker lmtrack takes only regions of the module", region->name);
	case KMIG_TRACKER_PAGEMAP:
		return kmig_tracker_pagemap_accepts(region);
	case KMIG_TRACKER_EXTERNAL:
		return 0;
	}
	return kmig_fail(region->ctx, -EINVAL, "source: tracker %d is not known", kind);
}

int kmig_tracker_new(const struct kmig_tracker_config *config, struct kmig_tracker **tracker)
{
	enum kmig_tracker_kind kind = config->kind;

	if (kind == KMIG_TRACKER_AUTO)
		kind = config->regions[0]->kind == KMIG_REGION_LMTRACK ? KMIG_TRACKER_LMTRACK : KMIG_TRACKER_PAGEMAP;
	if (kind == KMIG_TRACKER_EXTERNAL)
		return kmig_tracker_new_external(config, tracker);
	if (kind == KMIG_TRACKER_PAGEMAP)
		return kmig_tracker_new_pagemap(config, tracker);
	return kmig_tracker_new_lmtrack(config, tracker);
}
