module weightd/karpenter-merge

go 1.26.2

require (
	github.com/aws/karpenter-provider-aws v1.12.1
	github.com/awslabs/amazon-eks-ami/nodeadm v0.0.0-20240229193347-cfab22a10647 // indirect
)
