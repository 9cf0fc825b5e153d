package config

import "path/filepath"

// snapshotterType is the type of snapshotter plugins, which names their section and their directory.
const snapshotterType = "io.containerd.snapshotter.v1"

// Snapshotter is what every snapshotter can be told.
type Snapshotter struct{ RootPath string }

// Overlayfs is what the overlayfs snapshotter can be told.
type Overlayfs struct {
	Snapshotter
	UpperdirLabel, SyncRemove, SlowChown bool
	MountOptions                         []string
}

// Erofs is what the erofs snapshotter can be told.
type Erofs struct {
	Snapshotter
	OvlMountOptions []string
}

// Blockfile is what the blockfile snapshotter can be told.
type Blockfile struct {
	Snapshotter
	ScratchFile, FSType string
	MountOptions        []string
	RecreateScratch     bool
}

// Devmapper is what the devmapper snapshotter can be told.
type Devmapper struct {
	Snapshotter
	PoolName, BaseImageSize, FSType, FSOptions string
	AsyncRemove, DiscardBlocks                 bool
}

// SnapshotterRoot is the directory of a snapshotter: the one configured, or ROOT/io.containerd.snapshotter.v1.NAME.
func (c *Config) SnapshotterRoot(name string) string {
	for _, k := range snapshotters {
		if id(k.path) == id(in(snapshotterSection(name), "root_path")) {
			if root := value(k.field(c)).(string); root != "" {
				return root
			}
		}
	}
	return filepath.Join(c.Root, snapshotterType+"."+name)
}

func snapshotterSection(name string) []string {
	return []string{"plugins", snapshotterType + "." + name}
}

const rootPathDoc = "Directory of the snapshots; empty for one below root."

// snapshotters is what they can be told, one section each.
var snapshotters = []key{
	{in(snapshotterSection("overlayfs"), "root_path"), rootPathDoc, "",
		func(c *Config) any { return &c.Overlayfs.RootPath }, absoluteOrNone},
	{in(snapshotterSection("overlayfs"), "mount_options"), "Options that every overlay mount gets besides those that the kernel needs; volatile only where it is safe (docs/snapshotters.md).", []string{},
		func(c *Config) any { return &c.Overlayfs.MountOptions }, nil},
	{in(snapshotterSection("overlayfs"), "sync_remove"), "Whether a removal answers only when the files are deleted; otherwise they are deleted behind the answer.", false,
		func(c *Config) any { return &c.Overlayfs.SyncRemove }, nil},
	{in(snapshotterSection("overlayfs"), "slow_chown"), "Whether clients may copy a whole image to change its owners, where the kernel cannot map the IDs of a mount.", false,
		func(c *Config) any { return &c.Overlayfs.SlowChown }, nil},
	{in(snapshotterSection("overlayfs"), "upperdir_label"), "Whether the label containerd.io/snapshot/overlay.upperdir tells where a snapshot's own files are.", false,
		func(c *Config) any { return &c.Overlayfs.UpperdirLabel }, nil},

	{in(snapshotterSection("native"), "root_path"), rootPathDoc, "",
		func(c *Config) any { return &c.Native.RootPath }, absoluteOrNone},

	{in(snapshotterSection("btrfs"), "root_path"), "Directory of the snapshots, on a btrfs file system; empty for one below root.", "",
		func(c *Config) any { return &c.Btrfs.RootPath }, absoluteOrNone},

	{in(snapshotterSection("erofs"), "root_path"), rootPathDoc, "",
		func(c *Config) any { return &c.Erofs.RootPath }, absoluteOrNone},
	{in(snapshotterSection("erofs"), "ovl_mount_options"), "More options for each overlay mount.", []string{},
		func(c *Config) any { return &c.Erofs.OvlMountOptions }, nil},

	{in(snapshotterSection("blockfile"), "root_path"), rootPathDoc, "",
		func(c *Config) any { return &c.Blockfile.RootPath }, absoluteOrNone},
	{in(snapshotterSection("blockfile"), "scratch_file"), "File with an empty file system, of which snapshots without a parent are copies; empty: the snapshotter is left out.", "",
		func(c *Config) any { return &c.Blockfile.ScratchFile }, absoluteOrNone},
	{in(snapshotterSection("blockfile"), "fs_type"), "File system in scratch_file.", "ext4",
		func(c *Config) any { return &c.Blockfile.FSType }, nil},
	{in(snapshotterSection("blockfile"), "mount_options"), "More options for each mount.", []string{},
		func(c *Config) any { return &c.Blockfile.MountOptions }, nil},
	{in(snapshotterSection("blockfile"), "recreate_scratch"), "Whether scratch_file is copied again at each start of the daemon; otherwise once.", false,
		func(c *Config) any { return &c.Blockfile.RecreateScratch }, nil},

	{in(snapshotterSection("devmapper"), "root_path"), "Directory of the records of devices; empty for one below root.", "",
		func(c *Config) any { return &c.Devmapper.RootPath }, absoluteOrNone},
	{in(snapshotterSection("devmapper"), "pool_name"), "Thin pool, as dmsetup ls names it; empty: the snapshotter is left out.", "",
		func(c *Config) any { return &c.Devmapper.PoolName }, nil},
	{in(snapshotterSection("devmapper"), "base_image_size"), "Size of the file system that an image gets, such as 10GB. It is what a container can grow to.", "10GB",
		func(c *Config) any { return &c.Devmapper.BaseImageSize }, sizeOrNone},
	{in(snapshotterSection("devmapper"), "async_remove"), "Whether devices are deleted behind the answer to a removal.", false,
		func(c *Config) any { return &c.Devmapper.AsyncRemove }, nil},
	{in(snapshotterSection("devmapper"), "discard_blocks"), "Whether the blocks of a device are discarded when it is deleted, so that what is below the pool gets them back.", false,
		func(c *Config) any { return &c.Devmapper.DiscardBlocks }, nil},
	{in(snapshotterSection("devmapper"), "fs_type"), "File system that is made: ext4, ext2 or xfs.", "ext4",
		func(c *Config) any { return &c.Devmapper.FSType }, oneOf("ext4", "ext2", "xfs")},
	{in(snapshotterSection("devmapper"), "fs_options"), "Options of mkfs, instead of those that suit a thin device.", "",
		func(c *Config) any { return &c.Devmapper.FSOptions }, nil},

	{in(snapshotterSection("zfs"), "root_path"), "Directory that a ZFS dataset is mounted on; empty for one below root.", "",
		func(c *Config) any { return &c.Zfs.RootPath }, absoluteOrNone},
}
